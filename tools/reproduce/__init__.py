"""The experiment desk: published experiments that can be repeated, each arm beside its control."""

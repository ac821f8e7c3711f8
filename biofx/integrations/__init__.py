"""Plasticity in people's trainers, a file each: one line attaches, monitors, checkpoints and resumes.

- :class:`biofx.integrations.lightning.Plasticity`: a callback of Lightning;
- :class:`biofx.integrations.transformers.Plasticity`: a callback of the Trainer of transformers;
- :class:`biofx.integrations.skorch.Plasticity`: a callback of skorch;
- :func:`biofx.integrations.accelerate.attach`: for loops with Accelerate.

The trainer is given the transformed model, or a module that contains it: ``biofx.transform`` is called where
the model is made. No callback transforms: what a trainer loads checkpoints into, counts, compiles and hands
to its optimizer has to be the model that is trained, and whoever loads a checkpoint without the trainer (as
``load_from_checkpoint`` of Lightning) has to get the same one.
"""

"""What happens to a model while it trains: ``biofx.Monitor`` and the forms it writes."""

"""From the logs of training runs to laws of loss, learning rate and batch, and from those to the next runs. No torch."""

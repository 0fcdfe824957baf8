"""From the logs of training runs to laws of loss, learning rate and batch, and to the next runs. No torch."""

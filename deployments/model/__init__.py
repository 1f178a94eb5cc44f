"""The deployment on the device, and the engine inside it."""

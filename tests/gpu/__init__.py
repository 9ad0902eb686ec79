"""What depends on the device, with the same body for the CPU and, where there is one, a GPU."""

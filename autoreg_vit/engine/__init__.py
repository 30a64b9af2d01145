"""What trains: one step, one loop, the folder of a run, processes and the machine."""

"""What a run takes of memory, disk and time, worked out before anything is downloaded."""

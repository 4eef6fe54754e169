"""What is learned: examples, loss and measure of each kind of task; one file each."""

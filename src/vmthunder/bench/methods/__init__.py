"""Ways to have a disk on many nodes at once, VMThunder's and others', each behind `vmthunder.bench.cell.Method`."""

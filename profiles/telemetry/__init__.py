"""What the machine says about itself while tokens are made: power, temperatures, clocks, loads, memory."""

"""What everything else stands on: values, errors, specs and the ports. No I/O, no clock, no dice."""

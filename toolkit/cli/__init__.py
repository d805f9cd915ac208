"""The command line: arguments, help texts and what is printed; everything else is in `jobs`."""

"""What a run costs, before it runs: operations, bytes and time as formulas, and a plan of them."""

"""How a block runs: its plan, the programs of forward and backward, and the interpreter that runs them."""

"""How one turn is answered."""

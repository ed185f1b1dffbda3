"""What a Fisher matrix says: spectrum, importance, effective dimension."""

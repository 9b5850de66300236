"""The zoo: models of public packages as their packages ship them, in numbers of fused norms, equality and speed."""

"""Small worlds in which every number can be computed, to be watched in half a minute."""

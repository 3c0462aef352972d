"""The program `lvvit annotate`, and the crops that it labels where a recipe of training says how they are drawn."""

"""Painting with a loaded model, measuring what it paints, and showing it: metrics, picture grids, the
report."""

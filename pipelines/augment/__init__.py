"""What changes the pixels of a row once its window is on the canvas: drawn in the plan, applied by
every loader alike."""

"""The forms in which people hold images with labels: what `fap-convert` recognises and reads."""

"""Files by name, wherever they lie: in a folder, in a tar or a zip, or in many of them."""

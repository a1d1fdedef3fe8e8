"""The backends, one folder each; a folder is imported only when its backend is asked for."""

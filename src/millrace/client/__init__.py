"""client: what a Python user imports. ``millrace.open`` and the rest of it lead here."""

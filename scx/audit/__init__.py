"""What the accelerator sees of a prompt, measured: capture, attacks, report.

``python -m scx audit`` runs an engine in its own process, records what crosses
to the accelerator, hands each adversary what it would hold, and writes down how
much each attack recovers. Nothing of the package outside imports this one but
the command line, so that an engine that serves records nothing.
"""

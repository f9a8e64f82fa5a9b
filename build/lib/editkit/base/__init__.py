"""What every room needs and no room owns: errors, checked options, devices, progress, files and what is kept in them.

Knows nothing of models, facts or methods. Imports nothing of editkit.
"""

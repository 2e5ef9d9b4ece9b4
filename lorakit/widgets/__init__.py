"""Panels for notebooks, one a file. They show and ask; what is done is done in the rooms below.

They use what ipywidgets 7.7 (Colab's) and 8 share, and are shown by naming them at the end of a cell.
"""

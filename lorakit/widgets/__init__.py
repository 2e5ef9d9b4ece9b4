"""Panels for notebooks, one a file: fields, buttons and pictures for the functions of the other folders.

They use only what ipywidgets 7.7 (Colab's) and 8 share. A panel at the end of a cell is displayed.
"""

"""One HTML page from one or several runs. matplotlib is imported only when a figure is drawn."""

"""Experiments of the chapter on massive editing: trained hypernetworks, their costs, the printed figures."""

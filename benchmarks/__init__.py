"""Speed measured against what people would use instead; run from a checkout.

::

    python -m benchmarks.collectives    hopcoll's collectives and mpi4py's own, in turn, on one host

Figures and plots land in benchmarks/results/.
"""

"""Speed measured against what people would use instead; run from a checkout.

::

    python -m benchmarks.collectives    hopcoll's collectives and mpi4py's own, in turn, on one host
    python -m benchmarks.inline         small objects in messages, or pulled
    python -m benchmarks.lab            several hosts on one machine, with rate-limited links
    python -m benchmarks.lab.collectives    the collectives over them, against the wire's bound
    python -m benchmarks.lab.objects    broadcasts of objects over them
    python -m benchmarks.lab.object_reduces    reductions of objects over them
    python -m benchmarks.lab.peers      objects and collectives beside mpi4py, Gloo and Ray

Figures and plots land in benchmarks/results/.
"""

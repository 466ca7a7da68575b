# Nothing for Python: the ends of chunked transfers, for pipeline.

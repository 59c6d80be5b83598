class Format:
    E4M3, HYBRID = "e4m3", "hybrid"


class _Recipe:
    def __init__(self, fp8_format, **_):
        self.fp8_format = fp8_format


class DelayedScaling(_Recipe):
    pass


class Float8CurrentScaling(_Recipe):
    pass


class Float8BlockScaling(_Recipe):
    pass


class MXFP8BlockScaling(_Recipe):
    pass

"""Host memory as verl's device."""


class _Host:
    def synchronize(self) -> None: ...

    def empty_cache(self) -> None: ...


def get_nccl_backend() -> str:
    return "nccl"


def get_torch_device() -> _Host:
    return _Host()

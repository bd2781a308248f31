"""Python reads this file at start-up when its folder is on PYTHONPATH: connections that leave this machine are refused
in every process of the tests."""
import errno
import ipaddress
import os
import socket


def is_local(host):
    "Loopback, or this machine by name."
    host = host.decode() if isinstance(host, bytes) else host
    if host == "<broadcast>": return False
    if host in (None, "", "localhost", "ip6-localhost", socket.gethostname()): return True
    try: return ipaddress.ip_address(host.split("%")[0]).is_loopback or host in ("0.0.0.0", "::")
    except ValueError: return False


def refuse(host):
    raise OSError(errno.ENETUNREACH, f"the tests run without a network; something wanted to reach {host!r}")


def guarded(real, where):
    "`real` socket method, refusing addresses outside this machine; `where` finds the address among its arguments."
    def method(self, *args):
        address = args[where]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]): refuse(address[0])
        return real(self, *args)
    return method


def block():
    "Close the network for this process (Python sockets; the Hugging Face client is told to stay offline as well)."
    if getattr(socket, "_kit_blocked", False): return
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", INSTRUCTVIDEO_KIT_DOWNLOAD="0")
    for name, where in dict(connect=0, connect_ex=0, sendto=-1).items():
        setattr(socket.socket, name, guarded(getattr(socket.socket, name), where))
    real = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *args, **kwargs: real(host, *args, **kwargs) if is_local(host) else refuse(host)
    socket._kit_blocked = True


block()

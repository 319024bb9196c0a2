"""/etc inside a domain: what it may see of the template's, and what is made for it.

From the template come only names of the allow list; everything else of the host's /etc (shadow
files, host keys, machine id, network and mail set-up) does not exist inside. What programs cannot
do without is generated. docs/spec/core-stack.md 12.4.1.
"""

from __future__ import annotations

from sluice.domains.model import DomainConfig
from sluice.domains.sandbox.ids import NOBODY, USER_INSIDE
from sluice.runtime import INSIDE, INSIDE_BIN

# Shown read-only as they are in the template. qubes-rpc, qubes/rpc-config and profile.d are
# directories that are put together entry by entry, see mounts.py.
ALLOWED = (
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "ssl/certs",
    "ca-certificates",
    "ca-certificates.conf",
    "fonts",
    "localtime",
    "mime.types",
    "profile",
    "terminfo",
    "xdg",
    "bash.bashrc",
    "inputrc",
    # Fedora's own: what ~/.bashrc reads, where certificates and the choice of ciphers are.
    "bashrc",
    "crypto-policies",
    "pki/ca-trust/extracted",
    "pki/tls/certs",
    "pki/tls/cert.pem",
    "pki/tls/openssl.cnf",
)
MERGED = ("qubes-rpc", "qubes/rpc-config", "profile.d")

DEFAULT_PATH = f"{INSIDE_BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A login shell sets PATH anew; this puts our programs first again.
PROFILE = f'case ":$PATH:" in *":{INSIDE_BIN}:"*) ;; *) PATH="{INSIDE_BIN}:$PATH" ;; esac\n'


def home(user: str) -> str:
    """Return the home directory of the default user, inside."""
    return "/root" if user == "root" else f"/home/{user}"


def generated(domain: DomainConfig, *, has_root: bool) -> dict[str, str]:
    """Return the files made for a domain: name below /etc -> content.

    Where nobody is root inside there is no line for root: a service that asks for it is refused
    by the agent, which says why.
    """
    user = domain.default_user
    passwd, group = [], []
    if has_root:
        passwd.append("root:x:0:0:root:/root:/bin/bash")
        group.append("root:x:0:")
    if user != "root":
        passwd.append(f"{user}:x:{USER_INSIDE}:{USER_INSIDE}:{user}:{home(user)}:/bin/bash")
        group.append(f"{user}:x:{USER_INSIDE}:")
    passwd.append(f"nobody:x:{NOBODY}:{NOBODY}:nobody:/nonexistent:/usr/sbin/nologin")
    group.append(f"nogroup:x:{NOBODY}:")
    return {
        "passwd": "\n".join(passwd) + "\n",
        "group": "\n".join(group) + "\n",
        "hosts": f"127.0.0.1 localhost {domain.name}\n::1 localhost\n",
        "hostname": f"{domain.name}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "resolv.conf": "# no network: names are not resolved here\n",
        "machine-id": domain.uuid.replace("-", "") + "\n",
        "profile.d/00-sluice.sh": PROFILE,
    }


def environment(domain: DomainConfig, *, as_root: bool) -> dict[str, str]:
    """Return the environment that the agent starts with; nothing of ours is inherited."""
    user = "root" if as_root else domain.default_user
    # Where each call has a user of its own, the agent adds that user's (sluice.agent.users).
    session = {} if as_root else {"XDG_RUNTIME_DIR": f"/run/user/{USER_INSIDE}"}
    return session | {
        "PATH": DEFAULT_PATH,
        # Programs of the domain may `import sluice`; nothing else lies there.
        "PYTHONPATH": INSIDE,
        "HOME": home(user),
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
    }


def configuration(domain: DomainConfig) -> dict[str, str]:
    """Return the keys of the configuration visible inside (section 11): key -> value."""
    keys = {
        "name": domain.name,
        "type": domain.klass,
        "default-user": domain.default_user,
        "qubes-vm-type": _vm_type(domain),
        "qubes-vm-updateable": str(domain.klass in ("TemplateVM", "StandaloneVM")),
        "qubes-vm-persistence": _persistence(domain),
        "qubes-base-template": domain.template or "",
        "qubes-debug-mode": "1" if domain.debug else "0",
        "qubes-gui-enabled": "False",
    }
    for name, value in domain.features.items():
        if name.startswith("service."):
            keys["qubes-service/" + name.removeprefix("service.")] = "1" if value else "0"
        elif name.startswith("vm-config."):
            keys["vm-config/" + name.removeprefix("vm-config.")] = value
    return keys


def _vm_type(domain: DomainConfig) -> str:
    if domain.klass == "TemplateVM":
        return "TemplateVM"
    if domain.provides_network:
        return "ProxyVM" if domain.netvm else "NetVM"
    return "AppVM"


def _persistence(domain: DomainConfig) -> str:
    if domain.klass in ("TemplateVM", "StandaloneVM"):
        return "full"
    return "none" if domain.klass == "DispVM" else "rw-only"

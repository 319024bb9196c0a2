"""One file, several programs, told apart by the name under which it is called.

``qrexec-proxy``: the program form, as in /etc/qubes-rpc. ``qrexec-proxy-launcher``: the launcher
of the resident form. Any other name: the command ``sluice``, of which only ``proxy`` is here.
``--program NAME`` in front says the name; so the proxy starts its own programs.
"""

import os
import sys

import sluice_libraries

sluice_libraries.install()

name = sys.argv[0].rpartition("/")[2]
if sys.argv[1:2] == ["--program"]:
    name = sys.argv[2]
    del sys.argv[1:3]

if name == "qrexec-proxy":
    from sluice.proxy.program import main

    os._exit(main())
elif name == "qrexec-proxy-launcher":
    from sluice.proxy.launcher import main

    os._exit(main())
elif name == "sluice-proxy-worker":
    from sluice.proxy.worker import main

    code = main()
    sys.stderr.flush()
    os._exit(code)

from sluice.cli import main as cli  # noqa: E402

for other in list(cli.LAZY):
    if other != "proxy":
        del cli.LAZY[other]
cli.main(prog_name=name if name.endswith(".pyz") else "sluice")

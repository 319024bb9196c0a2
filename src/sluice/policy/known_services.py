"""Names that a linter should know: classes of domains, services of Qubes, and what is dangerous."""

from __future__ import annotations

from functools import cache

from sluice.policy.shipped import DIRECTORY

CLASSES = frozenset({"AdminVM", "AppVM", "TemplateVM", "StandaloneVM", "DispVM", "RemoteVM"})

KNOWN_TAGS = frozenset({"anon-vm", "anon-gateway", "whonix-updatevm", "disp-created-by-dom0"})
"""Tags that may be absent from a system and yet are no misspelling."""

# Services that ship with a Qubes-like system, by their exact names.
_QUBES = """
AppMenuSync Backup ClipboardCopy ClipboardPaste ConnectTCP DetachPciDevice FeaturesRequest Filecopy
GetAppmenus GetDate GetImageRGBA GetRandomizedTime GetRemotePassword Gpg GpgImportKey InputKeyboard
InputMouse InputTablet InstallUpdatesGUI NotifyTools NotifyUpdates OpenInVM OpenURL PdfConvert
PostInstall ReceiveUpdates ResizeDisk Restore RestoreById RestoreByUuid SelectDirectory SelectFile
SetDateTime SetGuiMode SetMonitorLayout ShowInTerminal ShutdownSelf SplitGPG SshAgent StartApp
SuspendPost SuspendPostAll SuspendPre SuspendPreAll SyncAppMenus SyncNtpClock TemplateDownload
TemplateSearch USB USBAttach USBDetach UpdatesProxy VMExec VMExecGUI VMRootExec VMRootShell VMShell
WaitForNetworkUplink WaitForRunningSystem WaitForSession WindowIconUpdater
"""
_POLICY = """
policy.Ask policy.Notify policy.EvalSimple policy.EvalGUI policy.RegisterArgument policy.GetFiles
policy.List policy.Get policy.Replace policy.Remove policy.include.List policy.include.Get
policy.include.Replace policy.include.Remove
"""
_ADMIN = "91-admin-default-deny.policy"  # has a rule for each method of the Admin API


@cache
def known_services() -> frozenset[str]:
    """Return the services that need no further sign of their existence."""
    methods = [line.split()[0] for line in (DIRECTORY / _ADMIN).read_text().splitlines()]
    return frozenset(
        [f"qubes.{name}" for name in _QUBES.split()]
        + _POLICY.split()
        + ["qrexec-proxy", "u2f.Authenticate", "u2f.Register"]
        + [method for method in methods if method.startswith("admin.")]
    )


DANGEROUS = {
    "qubes.VMShell": "runs any command in the target",
    "qubes.VMRootShell": "runs any command as root in the target",
    "qubes.VMExec": "runs any command in the target",
    "qubes.VMExecGUI": "runs any command in the target",
    "qubes.VMRootExec": "runs any command as root in the target",
    "qubes.ConnectTCP": "reaches any TCP port of the target",
    "qubes.Gpg": "signs and decrypts with the keys of the target",
    "qubes.GpgImportKey": "changes the keys of the target",
    "qubes.SshAgent": "signs with the keys of the target",
    "qubes.USB": "attaches devices",
    "qubes.InputKeyboard": "types into the target",
    "qubes.InputMouse": "clicks in the target",
    "qubes.InputTablet": "clicks in the target",
    "policy.Replace": "changes the policy",
    "policy.Remove": "changes the policy",
    "policy.include.Replace": "changes the policy",
    "policy.include.Remove": "changes the policy",
    "policy.RegisterArgument": "adds rules to the policy",
    "admin.vm.CreateDisposable": "starts domains",
}
"""Services that no rule should allow from, or to, everybody; with what they do."""

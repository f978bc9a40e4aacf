#!/bin/sh
# deb: `remove`, or `upgrade` and the like; rpm: 0, or how many versions stay. An upgrade changes nothing here: the rules
# and the socket stand until the new version's postinstall restarts the services.
set -e
case "${1:-}" in upgrade | failed-upgrade | deconfigure | [1-9]) exit 0 ;; esac
name=gke-metadata-emulator
cd /usr/lib/systemd/system
if [ -d /run/systemd/system ] && ! systemd-detect-virt -q --chroot; then
	# All in one transaction: a socket that is about to stop starts nothing. The watcher repairs what goes while it runs.
	systemctl stop "$name"[.-]* || true
	# ExecStopPost keeps the rules when onStop says so, and never ran for a unit that had failed.
	/usr/bin/$name routing remove || echo "$name: the rules are left as they are, see above" >&2
fi
for unit in "$name"[.-]*; do
	if grep -qs '^\[Install\]' "$unit" && command -v systemctl >/dev/null; then systemctl -q disable "$unit"; fi
done
rm -rf /var/lib/$name

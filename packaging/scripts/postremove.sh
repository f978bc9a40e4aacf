#!/bin/sh
# deb: `remove`, later `purge`, or `upgrade` and the like; rpm: 0, or how many versions stay.
set -e
case "${1:-}" in upgrade | failed-upgrade | abort-* | disappear | [1-9]) exit 0 ;; esac
name=gke-metadata-emulator
if [ -d /run/systemd/system ] && ! systemd-detect-virt -q --chroot; then
	systemctl daemon-reload
	systemctl reset-failed "$name"'[.-]*' 2>/dev/null || true
	rm -rf /run/$name
fi
if [ "${1:-}" != purge ]; then exit 0; fi
rm -rf "/etc/${name:?}" "/var/lib/$name" # what operators put beside the configuration goes too
if getent passwd $name >/dev/null; then userdel $name; fi # and its group
if getent group $name >/dev/null; then groupdel $name; fi

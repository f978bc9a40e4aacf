#!/bin/sh
# deb: `remove`, later `purge`, or `upgrade` and the like; rpm: 0, or how many versions stay.
set -e
case "${1:-}" in upgrade | failed-upgrade | abort-* | disappear | [1-9]) exit 0 ;; esac
name=gke-metadata-emulator etc=/etc/systemd/system
if [ "${1:-}" = purge ]; then # with what operators and recipes put beside it: files, and drop-ins of our units and of kubelet
	rm -rf "/etc/${name:?}" "/var/lib/$name" $etc/"$name"[.-]*.d
	for file in "$etc"/*.d/"10-$name.conf"; do
		if [ -e "$file" ]; then rm "$file" && rmdir --ignore-fail-on-non-empty "${file%/*}"; fi
	done
	if ! command -v userdel >/dev/null; then echo "$name: user and group $name stay: there is no userdel (package passwd)" >&2
	elif getent passwd $name >/dev/null; then userdel $name; fi # and its group
	if command -v groupdel >/dev/null && getent group $name >/dev/null; then groupdel $name; fi
fi
if [ -d /run/systemd/system ] && ! systemd-detect-virt -q --chroot; then
	systemctl daemon-reload
	systemctl reset-failed "$name"'[.-]*' 2>/dev/null || true
	rm -rf /run/$name
fi

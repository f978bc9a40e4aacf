#!/bin/sh
# A unit that this package never had before is enabled, as the machine's presets say, and started; one that it had is left
# as the operator has it, and restarted if it runs, but for the socket, which holds the listener for the service.
set -e
name=gke-metadata-emulator known=/var/lib/gke-metadata-emulator/units new='' old=''
if ! command -v systemctl >/dev/null; then exit 0; fi # Alpine
if [ -e /usr/lib/sysusers.d/$name.conf ]; then systemd-sysusers $name.conf; fi
for file in /usr/lib/systemd/system/"$name"[.-]*; do
	unit=${file##*/}
	if ! grep -qs '^\[Install\]' "$file"; then continue; fi # the presets have no say in it
	if ! grep -qsx "$unit" $known; then
		systemctl preset "$unit" && mkdir -p ${known%/*} && echo "$unit" >>$known
		if systemctl -q is-enabled "$unit"; then new="$new $unit"; fi
	elif [ "${unit##*.}" != socket ]; then old="$old $unit"; fi
done
if [ ! -d /run/systemd/system ] || systemd-detect-virt -q --chroot; then exit 0; fi # an image in the making
if [ -e /usr/lib/tmpfiles.d/$name.conf ]; then systemd-tmpfiles --create $name.conf; fi
systemctl daemon-reload
# A unit that does not start says why in its journal, and is no failed installation. shellcheck disable=SC2086
{ ${new:+"$(command -v deb-systemd-invoke || echo systemctl)" start $new}; ${old:+systemctl try-restart $old}; } || true

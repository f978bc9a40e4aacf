#!/bin/sh
# provision.sh PACKAGE [CONFIG]: installs the package, a deb or an rpm, into the image in which this script runs, as root: a virtual
# machine, a container or a chroot. KUBELET=kubelet.service makes that unit wait until the rules are installed.
#
# CONFIG is the configuration, which cloud-init can also write at first boot. A node without one refuses its pods.
set -eu
if [ $# = 0 ]; then
	echo "usage: [KUBELET=kubelet.service] sh provision.sh PACKAGE [CONFIG], as root: PACKAGE is a deb or an rpm" >&2
	exit 64
fi
[ "$(id -u)" = 0 ] || { echo "provision.sh: needs root to install the package: run it by sudo" >&2; exit 1; }
[ -r "$1" ] || { echo "provision.sh: $1 cannot be read: name a deb or an rpm" >&2; exit 1; }
name=gke-metadata-emulator
package=$(readlink -f "$1")
install_package() {
	case $package in
	*.deb) DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" ;;
	*.rpm) "$(command -v dnf || command -v tdnf || command -v yum)" install -y "$package" ;;
	*) echo "provision.sh: $package is neither a deb nor an rpm: its name must end with .deb or .rpm" >&2 && exit 64 ;;
	esac
}
if ! install_package; then # the image may have no package lists
	case $package in *.deb) apt-get update ;; *) exit 1 ;; esac
	install_package
fi
if [ -n "${2:-}" ]; then
	$name config check --config "$2"
	install -m 644 "$2" /etc/$name/config.yaml
fi
if [ -n "${KUBELET:-}" ]; then # the text of examples/kubelet-wait.conf, which images without documentation lack
	mkdir -p "/etc/systemd/system/$KUBELET.d"
	cat >"/etc/systemd/system/$KUBELET.d/10-$name.conf" <<-DROPIN
		[Service]
		ExecStartPre=/bin/sh -c "[ ! -e /usr/bin/gke-metadata-emulator ] || exec /usr/bin/gke-metadata-emulator routing check --wait=30s"
	DROPIN
fi
# systemctl is-enabled succeeds if one of several units is enabled, so each unit has its own command.
(cd /usr/lib/systemd/system && grep -l "^\[Install\]" "$name"[.-]*) | while read -r unit; do
	systemctl is-enabled "$unit" || { echo "provision.sh: $unit is not enabled: systemctl enable $unit" >&2; exit 1; }
done

#!/bin/sh
# provision.sh PACKAGE [CONFIG]: bakes the package, a deb or an rpm, into the image that this runs in, as root: in a virtual
# machine, a container or a chroot. KUBELET=kubelet.service makes that unit wait until the rules stand.
#
# Without CONFIG, which is what a node's cloud-init can write later, pods of a node that boots the image are refused.
set -eu
if [ $# = 0 ]; then
	echo "usage: [KUBELET=kubelet.service] sh provision.sh PACKAGE [CONFIG], as root: PACKAGE is a deb or an rpm" >&2
	exit 64
fi
[ "$(id -u)" = 0 ] || { echo "provision.sh: installing a package needs root: run it by sudo" >&2; exit 1; }
[ -r "$1" ] || { echo "provision.sh: there is no package $1" >&2; exit 1; }
name=gke-metadata-emulator
package=$(readlink -f "$1")
install_package() {
	case $package in
	*.deb) DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" ;;
	*.rpm) "$(command -v dnf || command -v tdnf || command -v yum)" install -y "$package" ;;
	*) echo "provision.sh: $package is neither a deb nor an rpm" >&2 && exit 64 ;;
	esac
}
if ! install_package; then # an image without lists of packages
	case $package in *.deb) apt-get update ;; *) exit 1 ;; esac
	install_package
fi
if [ -n "${2:-}" ]; then
	$name config check --config "$2"
	install -m 644 "$2" /etc/$name/config.yaml
fi
if [ -n "${KUBELET:-}" ]; then # as examples/kubelet-wait.conf, which an image without documents lacks
	mkdir -p "/etc/systemd/system/$KUBELET.d"
	cat >"/etc/systemd/system/$KUBELET.d/10-$name.conf" <<-DROPIN
		[Service]
		ExecStartPre=/bin/sh -c "[ ! -e /usr/bin/gke-metadata-emulator ] || exec /usr/bin/gke-metadata-emulator routing check --wait=30s"
	DROPIN
fi
# Several names in one command would be content with one that is enabled.
(cd /usr/lib/systemd/system && grep -l "^\[Install\]" "$name"[.-]*) | while read -r unit; do
	systemctl is-enabled "$unit" || { echo "provision.sh: $unit is not enabled: systemctl enable $unit" >&2; exit 1; }
done

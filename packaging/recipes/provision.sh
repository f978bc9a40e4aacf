#!/bin/sh
# provision.sh PACKAGE [CONFIG]: bakes the package, a deb or an rpm, into the image that this runs in, as root: in a virtual
# machine, a container or a chroot. KUBELET=kubelet.service makes that unit wait until the rules stand.
#
# Without CONFIG, which is what a node's cloud-init can write later, pods of a node that boots the image are refused.
set -eu
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
	printf '[Service]\nExecStartPre=/usr/bin/%s routing check --wait=30s\n' $name >"/etc/systemd/system/$KUBELET.d/10-$name.conf"
fi
systemctl is-enabled $name.socket $name.service $name-routing.service $name-reload.path $name-credential.path

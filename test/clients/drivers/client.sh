#!/bin/sh
# Answers what the ring asks of programs; see ring/client.go for the questions. Argument: the program. What each writes to
# standard error says why it failed.
none() { echo '{"none":true}'; }
value() { printf '{"value":"%s"}\n' "$1"; }
fail() { printf '{"error":"%s"}\n' "$(tr '\n"\\' '   ' </tmp/error | cut -c1-400)"; }

rclone_() {
	case $1 in
	version) value "$(rclone version 2>/dev/null | sed -n '1s/rclone v//p')" ;;
	token) # the ring's Cloud Storage has one bucket, and its name is the token
		if bucket=$(rclone lsf --config /dev/null --retries 1 --low-level-retries 1 --gcs-project-number 1 \
			--gcs-endpoint "$RING_STORAGE/storage/v1/" :gcs: 2>/tmp/error); then value "${bucket%/}"; else fail; fi
		;;
	*) none ;;
	esac
}

# cloud-init wants no token: its data source reads the instance and stops where something is missing.
cloudinit_() {
	case $1 in
	version) value "$(python3 -c 'from cloudinit import version; print(version.version_string())')" ;;
	detect)
		if found=$(python3 2>/tmp/error -c '
from cloudinit.sources import DataSourceGCE as gce
params = type("Params", (), {"num_retries": 1, "sec_between_retries": 0})
r = gce.read_md(url_params=params, platform_check=False)
assert r["success"], r["reason"]
assert r["meta-data"]["local-hostname"] and r["meta-data"]["instance-id"], r
print("true")'); then value "$found"; else fail; fi
		;;
	*) none ;;
	esac
}

while read -r question; do "$1_" "$question"; done

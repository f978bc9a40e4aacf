#!/bin/sh
# Driver of programs; ring/client.go has the questions. Argument: the program. Errors are the program's
# standard error.
none() { echo '{"none":true}'; }
value() { printf '{"value":"%s"}\n' "$1"; }
fail() { printf '{"error":"%s"}\n' "$(tr '\n"\134' '   ' </tmp/error | cut -c1-400)"; }

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

# Prometheus discovers the one machine of the ring's Compute Engine. Its name is the token.
prometheus_() {
	case $1 in
	version) value "$(prometheus --version 2>&1 | sed -n '1s/.*version \([^ ]*\).*/\1/p')" ;;
	token)
		rm -rf /tmp/prometheus
		mkdir /tmp/prometheus
		printf 'scrape_configs: [{job_name: j, gce_sd_configs: [{project: my-project, zone: z, refresh_interval: 1s}]}]\n' >/tmp/prometheus/config.yml
		prometheus --config.file=/tmp/prometheus/config.yml --storage.tsdb.path=/tmp/prometheus/data --web.listen-address=127.0.0.1:19090 \
			>/tmp/error 2>&1 &
		if found=$(python3 -c '
import json, time, urllib.request
end = time.monotonic() + 15
while True:
    try:
        with urllib.request.urlopen("http://127.0.0.1:19090/api/v1/targets", timeout=2) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
        if targets:
            print(targets[0]["discoveredLabels"]["__meta_gce_instance_name"])
            break
    except OSError:
        pass
    if time.monotonic() > end:
        raise SystemExit(1)
    if "could not find default credentials" in open("/tmp/error").read():
        raise SystemExit(1)
    time.sleep(0.05)
' 2>/dev/null); then value "$found"; else fail; fi
		kill $! 2>/dev/null
		wait $! 2>/dev/null
		;;
	*) none ;;
	esac
}

# cloud-init requests no token: its data source reads the instance's metadata, and fails if a value is missing.
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

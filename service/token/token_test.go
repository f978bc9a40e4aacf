package token

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/workload"
)

var (
	ana  = workload.ServiceAccount{Namespace: "team", Name: "ana"}
	gana = workload.Account{GoogleEmail: "ana@project.iam.gserviceaccount.com"}
)

func TestG07ScopesAreNormalised(t *testing.T) {
	const drive, sql = "https://www.googleapis.com/auth/drive", "https://www.googleapis.com/auth/sqlservice.admin"
	for _, c := range []struct {
		in   []string
		want string
	}{
		{nil, cloudPlatform + " " + userinfoEmail},
		{[]string{""}, cloudPlatform + " " + userinfoEmail},
		{[]string{cloudPlatform}, cloudPlatform + " " + userinfoEmail},
		{[]string{userinfoEmail, cloudPlatform}, cloudPlatform + " " + userinfoEmail},
		{[]string{cloudPlatform + " " + userinfoEmail}, cloudPlatform + " " + userinfoEmail},
		{[]string{userinfoEmail}, userinfoEmail},
		{[]string{sql, drive, sql}, drive + " " + sql},
		{[]string{sql + "\t" + drive, " "}, drive + " " + sql},
		// T-03: a comma list, with spaces, empty items and in more than one parameter.
		{[]string{sql + "," + drive}, drive + " " + sql},
		{[]string{" " + sql + " ,, " + drive + ",", "", ",", drive + "\u00a0" + sql}, drive + " " + sql},
		{[]string{","}, cloudPlatform + " " + userinfoEmail},
		{[]string{cloudPlatform + ",", cloudPlatform}, cloudPlatform + " " + userinfoEmail},
		{[]string{userinfoEmail + "," + cloudPlatform}, cloudPlatform + " " + userinfoEmail},
		{[]string{cloudPlatform + ", " + userinfoEmail}, cloudPlatform + " " + userinfoEmail},
		{[]string{userinfoEmail, cloudPlatform + "," + userinfoEmail}, cloudPlatform + " " + userinfoEmail},
	} {
		if got := AccessToken(ana, gana, c.in); got.Scopes != c.want {
			t.Errorf("scopes %q: %q, want %q", c.in, got.Scopes, c.want)
		}
	}
	if AccessToken(ana, gana, []string{sql, drive}) != AccessToken(ana, gana, []string{drive, sql}) {
		t.Error("the order of the scopes makes two entries of one")
	}
}

// T-03: commas may come encoded or not.
func TestT03ScopesOfAQuery(t *testing.T) {
	const drive, sql = "https://www.googleapis.com/auth/drive", "https://www.googleapis.com/auth/sqlservice.admin"
	want := AccessToken(ana, gana, []string{drive, sql})
	for _, query := range []string{
		"scopes=" + sql + "," + drive,
		"scopes=" + sql + "%2C" + drive,
		"scopes=" + url.QueryEscape(sql+","+drive),
		"scopes=" + sql + ",+" + drive,
		"scopes=" + sql + "&scopes=" + drive,
		"scopes=" + sql + ",&scopes=%20" + drive + "&scopes=",
	} {
		v, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if got := AccessToken(ana, gana, v["scopes"]); got != want {
			t.Errorf("%s: %q, want %q", query, got.Scopes, want.Scopes)
		}
	}
}

func TestTokenShowsNothing(t *testing.T) {
	tok := Token{Value: "ya29.secret", Expires: time.Unix(1e9, 0), Minted: time.Unix(1e9-3600, 0)}
	var shown []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%p", "%T"} {
		for _, v := range []any{tok, &tok, []Token{tok}, map[string]Token{"t": tok}, struct{ T Token }{tok},
			struct{ T *Token }{&tok}} {
			if verb != "%p" {
				shown = append(shown, fmt.Sprintf(verb, v))
			}
		}
	}
	shown = append(shown, fmt.Sprint(tok), tok.String(), tok.GoString(), fmt.Errorf("x: %v", tok).Error())
	for _, v := range []any{tok, &tok, []Token{tok}, map[string]Token{"t": tok}} {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		shown = append(shown, string(raw))
	}
	text, err := tok.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range append(shown, string(text)) {
		if strings.Contains(s, "secret") || strings.Contains(s, fmt.Sprintf("%x", "secret")) {
			t.Errorf("shows the value: %s", s)
		}
	}
	if got, want := tok.String(), "token (expires 2001-09-09T01:46:40Z)"; got != want {
		t.Errorf("String: %q, want %q", got, want)
	}
}

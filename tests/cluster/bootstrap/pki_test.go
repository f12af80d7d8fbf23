package bootstrap

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/client-go/tools/clientcmd"
)

func writePKI(t *testing.T) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "pki")
	arguments := []string{"--out", folder, "--server", "https://10.200.0.1:6443", "--hosts", "127.0.0.1,10.96.0.1", "--node", "node7", "--node-address", "10.200.0.1"}
	if err := WritePKI(arguments); err != nil {
		t.Fatal(err)
	}
	return folder
}

func certificate(t *testing.T, folder, name string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(folder, name+".crt"), filepath.Join(folder, name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf
}

func TestServersAnswerToTheirNamesAndClientsAreWhoTheySay(t *testing.T) {
	folder := writePKI(t)
	roots := x509.NewCertPool()
	ca, _ := os.ReadFile(filepath.Join(folder, "ca.crt"))
	if !roots.AppendCertsFromPEM(ca) {
		t.Fatal("no CA")
	}
	for _, server := range []struct{ file, name string }{
		{"apiserver", "127.0.0.1"}, {"apiserver", "10.96.0.1"}, {"apiserver", "kubernetes.default.svc"}, {"kubelet", "node7"}, {"kubelet", "10.200.0.1"},
	} {
		if _, err := certificate(t, folder, server.file).Verify(x509.VerifyOptions{DNSName: server.name, Roots: roots}); err != nil {
			t.Errorf("%s as %s: %v", server.file, server.name, err)
		}
	}
	if _, err := certificate(t, folder, "apiserver").Verify(x509.VerifyOptions{DNSName: "10.200.0.2", Roots: roots}); err == nil {
		t.Error("the apiserver answers to an address that is not its own")
	}
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if _, err := certificate(t, folder, "scheduler").Verify(x509.VerifyOptions{Roots: roots, KeyUsages: client}); err != nil {
		t.Error(err)
	}
	if _, err := certificate(t, folder, "scheduler").Verify(x509.VerifyOptions{Roots: roots}); err == nil {
		t.Error("a client's certificate serves")
	}
	kubelet := certificate(t, folder, "kubelet").Subject
	if kubelet.CommonName != "system:node:node7" || len(kubelet.Organization) != 1 || kubelet.Organization[0] != "system:nodes" {
		t.Error(kubelet)
	}
	admin := certificate(t, folder, "admin").Subject
	if len(admin.Organization) != 1 || admin.Organization[0] != "system:masters" {
		t.Error(admin)
	}
}

func TestAKubeconfigHoldsAllThatAClientNeeds(t *testing.T) {
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(writePKI(t), "admin.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if config.Host != "https://10.200.0.1:6443" || len(config.CAData) == 0 {
		t.Error(config.Host)
	}
	if _, err := tls.X509KeyPair(config.CertData, config.KeyData); err != nil {
		t.Error(err)
	}
}

func TestKeysAreForTheirOwnerAndASecondRunChangesNothing(t *testing.T) {
	folder := writePKI(t)
	info, err := os.Stat(filepath.Join(folder, "ca.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info.Mode(), err)
	}
	before, _ := os.ReadFile(filepath.Join(folder, "ca.crt"))
	if err := WritePKI([]string{"--out", folder, "--server", "https://other:1", "--hosts", "other", "--node-address", "10.0.0.1"}); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(filepath.Join(folder, "ca.crt")); string(after) != string(before) {
		t.Error("the CA was made anew")
	}
	if err := WritePKI([]string{"--out", folder}); err == nil {
		t.Error("a call without addresses passes")
	}
}

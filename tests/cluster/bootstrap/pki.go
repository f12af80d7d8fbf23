package bootstrap

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	api "k8s.io/client-go/tools/clientcmd/api"
)

// A cluster is for tests and demonstrations and lives days; its certificates outlive it.
const validity = 10 * 365 * 24 * time.Hour

// authority signs the cluster's certificates.
type authority struct {
	certificate *x509.Certificate
	key         crypto.Signer
	pem         []byte
}

// identity is one client or server: its certificate's subject and, for servers, the names that it answers to.
type identity struct {
	file          string
	subject       pkix.Name
	hosts         []string
	hasKubeconfig bool
}

// WritePKI fills a folder with a CA, the certificates and kubeconfigs of all components, and the key that signs service account tokens.
// The folder appears only when it is whole, so that an interrupted run leaves nothing half made.
func WritePKI(arguments []string) error {
	flags := flag.NewFlagSet("pki", flag.ExitOnError)
	out := flags.String("out", "", "folder to write; left as it is where it exists")
	server := flags.String("server", "", "the apiserver's URL, for the kubeconfigs")
	hosts := flags.String("hosts", "", "addresses and names of the apiserver, separated by commas")
	node := flags.String("node", "node1", "name of the node")
	nodeAddress := flags.String("node-address", "", "the node's address")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	if *out == "" || *server == "" || *hosts == "" || *nodeAddress == "" {
		return errors.New("--out, --server, --hosts and --node-address are needed")
	}
	if _, err := os.Stat(*out); err == nil {
		return nil
	}
	folder, err := os.MkdirTemp(filepath.Dir(*out), ".pki-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)

	ca, err := newAuthority()
	if err != nil {
		return err
	}
	if err := ca.write(folder); err != nil {
		return err
	}
	apiHosts := append([]string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
		"localhost"}, strings.Split(*hosts, ",")...)
	masters := []string{"system:masters"}
	for _, identity := range []identity{
		{file: "apiserver", subject: pkix.Name{CommonName: "kube-apiserver"}, hosts: apiHosts},
		{file: "apiserver-kubelet-client", subject: pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: masters}},
		{file: "front-proxy-client", subject: pkix.Name{CommonName: "front-proxy-client"}},
		{file: "admin", subject: pkix.Name{CommonName: "admin", Organization: masters}, hasKubeconfig: true},
		{file: "controller-manager", subject: pkix.Name{CommonName: "system:kube-controller-manager"}, hasKubeconfig: true},
		{file: "scheduler", subject: pkix.Name{CommonName: "system:kube-scheduler"}, hasKubeconfig: true},
		{file: "kube-proxy", subject: pkix.Name{CommonName: "system:kube-proxy"}, hasKubeconfig: true},
		{file: "volume-provisioner", subject: pkix.Name{CommonName: "volume-provisioner"}, hasKubeconfig: true},
		{file: "coredns", subject: pkix.Name{CommonName: "coredns"}, hasKubeconfig: true},
		{file: "kubelet", subject: pkix.Name{CommonName: "system:node:" + *node, Organization: []string{"system:nodes"}},
			hosts: []string{*node, *nodeAddress}, hasKubeconfig: true},
	} {
		if err := ca.issue(folder, identity, *server); err != nil {
			return err
		}
	}
	if err := writeServiceAccountKey(folder); err != nil {
		return err
	}
	return os.Rename(folder, *out)
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificateTemplate(pkix.Name{CommonName: "kubernetes-ca"})
	template.IsCA = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{certificate, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}, nil
}

func (ca *authority) write(folder string) error {
	if err := os.WriteFile(filepath.Join(folder, "ca.crt"), ca.pem, 0o644); err != nil {
		return err
	}
	_, err := writeKey(filepath.Join(folder, "ca.key"), ca.key)
	return err
}

func (ca *authority) issue(folder string, id identity, server string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := certificateTemplate(id.subject)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if len(id.hosts) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, host := range id.hosts {
		if address := net.ParseIP(host); address != nil {
			template.IPAddresses = append(template.IPAddresses, address)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.certificate, key.Public(), ca.key)
	if err != nil {
		return err
	}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(filepath.Join(folder, id.file+".crt"), certificate, 0o644); err != nil {
		return err
	}
	keyPEM, err := writeKey(filepath.Join(folder, id.file+".key"), key)
	if err != nil || !id.hasKubeconfig {
		return err
	}
	config := api.NewConfig()
	config.Clusters["plimsoll"] = &api.Cluster{Server: server, CertificateAuthorityData: ca.pem}
	config.AuthInfos[id.file] = &api.AuthInfo{ClientCertificateData: certificate, ClientKeyData: keyPEM}
	config.Contexts["plimsoll"] = &api.Context{Cluster: "plimsoll", AuthInfo: id.file}
	config.CurrentContext = "plimsoll"
	return clientcmd.WriteToFile(*config, filepath.Join(folder, id.file+".conf"))
}

func writeServiceAccountKey(folder string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if _, err := writeKey(filepath.Join(folder, "service-account.key"), key); err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, "service-account.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644)
}

func certificateTemplate(subject pkix.Name) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	// A machine whose clock was just set back must still accept the certificates.
	start := time.Now().Add(-time.Hour)
	return &x509.Certificate{SerialNumber: serial, Subject: subject, NotBefore: start, NotAfter: start.Add(validity), BasicConstraintsValid: true}
}

func writeKey(path string, key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return text, os.WriteFile(path, text, 0o600)
}
